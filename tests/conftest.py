"""What holds for every test: none fails for being slow, since the first call of a kernel compiles."""

from hypothesis import settings

settings.register_profile("layline", deadline=None)
settings.load_profile("layline")
