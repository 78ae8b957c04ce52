"""`python -m layline`, and the `layline` script."""

from layline.cli import main

if __name__ == "__main__":
    main()
