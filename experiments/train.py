"""The command `kd-ranker train` in a clone."""

from kd_ranker.main import main

if __name__ == "__main__":
    main("train")
