"""`python -m src.tools.report FOLDER`."""

from src.options import report_parser
from src.runtime.errors import reports_input_errors

if __name__ == "__main__":
    reports_input_errors(report_parser().parse_args)()  # answers --help at once

from src.tools.report.page import main

if __name__ == "__main__":
    main()
