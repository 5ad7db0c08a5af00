"""The command `kd-ranker run` in a clone."""

from kd_ranker.main import main

if __name__ == "__main__":
    main("run")
