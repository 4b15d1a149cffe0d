"""`python -m bgjob.ext.django`: bgjob's command line in a Django program.

`manage.py bgjob worker --processes` starts its processes so. DJANGO_SETTINGS_MODULE is needed.
"""

import os
import sys

import django

from bgjob.cli import main

if __name__ == "__main__":
    here = os.getcwd()  # noqa: PTH109 (a string is needed)
    if here not in sys.path:
        sys.path.insert(0, here)
    django.setup()
    sys.exit(main())
