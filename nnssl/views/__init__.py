"""Views of a batch, made on the device: parameters are drawn, then applied."""
