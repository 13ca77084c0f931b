"""The no-regret experiment: is there a radius that nobody has to search for? README.md says what is run and why."""
