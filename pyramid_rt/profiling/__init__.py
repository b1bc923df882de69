"""Profiles: where the time of a call goes, as spans, a table, a trace and a picture. Other calls never import it."""
