"""Pages for people: the small ones that an end user is sent to."""
