"""Names and objects as a client asks for them."""
