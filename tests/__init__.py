import common  # noqa: F401  sets the environment before any library reads it
