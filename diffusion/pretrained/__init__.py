"""The pretrained world: what other libraries' files mean here."""
