"""`python -m dsplugins`, for torchrun's `-m`."""

from dsplugins.cli import main

if __name__ == "__main__":
    main()
