"""`python -m kd_ranker`, the command `kd-ranker` of this Python."""

from kd_ranker.main import main

if __name__ == "__main__":
    main()
