"""A recipe on many machines: what is started where, written from the templates in `launch/`."""
