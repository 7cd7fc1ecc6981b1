"""PEP 517 backend: setuptools, built against the torch that is already installed.

pip builds in an isolated environment. Listing torch as a build requirement would make it download a second torch (3 GB)
for every build, and perhaps another version than the one that will load the extension. So each hook lends the build
the torch that lies in the site-packages of the same Python, and asks for one only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig

from setuptools import build_meta

TORCH = "torch>=2.13"


def _site_packages() -> list[str]:
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        candidates.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(candidates) if path]


def _installed_torch() -> str | None:
    """The site-packages folder that holds a usable torch, or None."""
    for path in _site_packages():
        if os.path.isfile(os.path.join(path, "torch", "version.py")):
            return path
    return None


def _lend_torch() -> None:
    """Make the installed torch importable for the build, behind everything the isolated environment brings itself."""
    path = _installed_torch()
    if path and importlib.util.find_spec("torch") is None and path not in sys.path:
        sys.path.append(path)


def _requires() -> list[str]:
    if importlib.util.find_spec("torch") is not None or _installed_torch():
        return []
    return [TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requires()


def get_requires_for_build_editable(config_settings=None):
    return _requires()


def get_requires_for_build_sdist(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _lend_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _lend_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _lend_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _lend_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return build_meta.build_sdist(sdist_directory, config_settings)
