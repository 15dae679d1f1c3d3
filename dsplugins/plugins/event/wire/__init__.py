"""What the plugin `bytes_on_wire` is made of: counting, predicting, and the table of both."""
