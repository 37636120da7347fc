"""`python -m surgery.cli`, for where the script is not on the path."""

from surgery.cli import main

if __name__ == "__main__":
    main()
