"""What holds for every test: none fails for being slow, since a first call may compile."""

from hypothesis import settings

settings.register_profile("layline", deadline=None)
settings.load_profile("layline")
