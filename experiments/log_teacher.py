"""The command `kd-ranker log-teacher` in a clone."""

from kd_ranker.main import main

if __name__ == "__main__":
    main("log-teacher")
