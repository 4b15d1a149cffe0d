"""The settings of the tests' project; SHOP_* variables change what a test needs."""

import json
import os
import sys

import django
from psycopg.conninfo import conninfo_to_dict


def database(dsn: str, **changes: object) -> dict[str, object]:
    parts = conninfo_to_dict(dsn)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts["dbname"],
        "USER": parts.get("user", ""),
        "PASSWORD": parts.get("password", ""),
        "HOST": parts.get("host", ""),
        "PORT": parts.get("port", ""),
    } | changes


SECRET_KEY = "secret"
DEBUG = "SHOP_DEBUG" in os.environ
ALLOWED_HOSTS = ["*"]
USE_TZ = True
TIME_ZONE = "Europe/Vienna"
ROOT_URLCONF = "mysite.urls"
ASGI_APPLICATION = "mysite.asgi.application"
DATABASES = {
    "default": database(os.environ["SHOP_DSN"], **json.loads(os.environ.get("SHOP_DATABASE", "{}")))
}
if "SHOP_OTHER_DSN" in os.environ:
    DATABASES["other"] = database(os.environ["SHOP_OTHER_DSN"])
if "SHOP_SQLITE" in os.environ:
    DATABASES["other"] = DATABASES["default"]
    DATABASES["default"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
if "SHOP_PSYCOPG2" in os.environ:  # Django takes psycopg 3 wherever it is installed
    import psycopg

    sys.modules["psycopg"] = None
    import django.db.backends.postgresql.base

    sys.modules["psycopg"] = psycopg
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "bgjob.ext.django",
    "shop",
]
if django.VERSION < (6,):
    INSTALLED_APPS.append("django_tasks")
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
STATIC_URL = "static/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
BACKEND = "bgjob.ext.django.task_backend.TaskBackend"
TASKS = {
    "default": {"BACKEND": BACKEND, "QUEUES": ["default", "emails"]},
    "once": {"BACKEND": BACKEND, "OPTIONS": {"max_attempts": 1}},
    "kept": {"BACKEND": BACKEND, "OPTIONS": {"keep_results": 60, "max_attempts": 2}},
}
globals().update(json.loads(os.environ.get("SHOP_SETTINGS", "{}")))
