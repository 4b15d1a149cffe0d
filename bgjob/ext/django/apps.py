"""The app, which Django finds by its package: INSTALLED_APPS = ["bgjob.ext.django"]."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class BgjobConfig(AppConfig):
    """The app `bgjob`."""

    name = "bgjob.ext.django"
    label = "bgjob"
    verbose_name = _("Background jobs")

    def ready(self) -> None:
        """Register the system checks."""
        from bgjob.ext.django import checks  # noqa: F401, PLC0415 (when the apps are loaded)
