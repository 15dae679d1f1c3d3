"""An extension of apex that is there and does nothing."""
