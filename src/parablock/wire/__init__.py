"""Messages as bytes, and the link that carries them."""
