from apis.api import API  # noqa: F401
