"""Code that several tests share; no tests."""
