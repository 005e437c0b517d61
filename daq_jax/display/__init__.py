"""Tables, pictures and pages for people. rich, matplotlib and jinja2 are imported here alone."""
