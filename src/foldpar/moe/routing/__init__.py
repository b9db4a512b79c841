"""Which expert gets which token, and with which weight."""
