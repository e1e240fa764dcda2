"""What can go wrong, as users meet it. Every message says where, what was found, what is allowed and what to do.

WorkbenchError        exit code 2 unless the class says otherwise
    StudyFileError    the YAML file or an override is wrong; holds every problem found
    DataError         the pictures or annotations cannot be used
    StoreError        the runs folder cannot be used or a record cannot be read
    BusyError         exit code 3: somebody else runs this study
"""

LIMIT_REACHED = 4
"""Exit code of a run that was stopped in good order by a limit of its own: neither a failure nor a success."""


class WorkbenchError(Exception):
    """Base of the errors that are shown without a traceback."""

    exit_code = 2


class StudyFileError(WorkbenchError):
    """The study file or an override is wrong; the message has one line for each problem."""


class DataError(WorkbenchError):
    """The pictures or annotations cannot be used."""


class StoreError(WorkbenchError):
    """The runs folder cannot be used, or a record in it cannot be read."""


class BusyError(WorkbenchError):
    """Another driver runs this study or trial."""

    exit_code = 3
