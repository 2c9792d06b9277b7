"""Environments in the forms of other libraries, as episodes. Each module needs a package of its own or none;
a run imports the one that its config names."""
