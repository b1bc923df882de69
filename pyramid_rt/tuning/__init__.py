"""The search for a pyramid's defaults: recorded answers, replayed rounds, measured candidates."""
