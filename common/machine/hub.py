"""The errors of a connection to the Hugging Face hub."""

from huggingface_hub.errors import HfHubHTTPError

# huggingface_hub lets the errors of its HTTP library through, such as time-outs and broken connections. Which library
# that is changes between its versions: httpx, then httpx2. In both, such errors derive from a class HTTPError, and
# HfHubHTTPError derives from the same class. So it is found among the base classes, without a name of the library.
_BASES_BY_NAME = {base.__name__: base for base in HfHubHTTPError.__mro__}
TransportError: type[Exception] = _BASES_BY_NAME["HTTPError"]
