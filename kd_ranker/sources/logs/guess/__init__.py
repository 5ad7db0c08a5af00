"""A first config for a log: what its columns seem to be, and why.

`sample` has the engine read a bounded part of the log, and `facts` asks it what each column is and
depends on; `rules` is the table of what speaks for a role, by these facts and by `names`. With it
`ids` tells requests, items and users, `roles` the other roles, and `features` what is left;
`funnel` counts how many candidates pass where. `first_config` has them work together and writes the
guesses as a config file.
"""
