"""The command `kd-ranker train-teacher` in a clone."""

from kd_ranker.main import main

if __name__ == "__main__":
    main("train-teacher")
