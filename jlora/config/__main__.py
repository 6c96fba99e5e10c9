"""`python -m jlora.config`: print the configuration reference."""

from jlora.config import main

if __name__ == "__main__":
    main()
