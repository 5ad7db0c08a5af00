"""The command `kd-ranker prepare` in a clone."""

from kd_ranker.main import main

if __name__ == "__main__":
    main("prepare")
