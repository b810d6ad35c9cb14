"""What strangers hand over: adapters, models, templates, rows, configs, names. Each is refused in our
own words, in time, with nothing run and nothing written; or it is harmless and read."""
