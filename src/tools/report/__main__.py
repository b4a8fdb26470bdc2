"""`python -m src.tools.report`: see `src/tools/report/page.py`."""

from src.tools.report.page import main

if __name__ == "__main__":
    main()
