"""What goes wrong between here and the hub."""

from huggingface_hub.errors import HfHubHTTPError

# The base of the HTTP library's own errors (time-outs, broken connections), which huggingface_hub lets through; it has
# changed that library between its versions.
TransportError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
