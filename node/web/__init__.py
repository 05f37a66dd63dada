"""An HTTP/1.1 server on h11."""
