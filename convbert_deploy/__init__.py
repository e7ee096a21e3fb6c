"""ConvBERT in production: export, build engines, prove them equal, time them, serve them."""

__version__ = "0.1.0"
