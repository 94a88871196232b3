"""A JupyterLab with files and a token of its own, and a hand on it: ``serve`` starts the server, ``Lab.open`` a notebook in Chromium."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Locator, Page, TimeoutError

START = 120  # seconds for the server, and for a notebook with its kernel, to be ready; a shared machine needs more than a quiet one
RUN = 240  # seconds for the cells of a notebook
RESPONSE = 5  # seconds for an explorer to follow its control; half a second on quiet cores

# Without a sandbox, as root has none in a container; and nothing that looks for a network.
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
# The status bar says idle before there is a kernel: ask notebook, session and kernel.
READY = """name => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.path === name && panel.context.isReady && panel.sessionContext.isReady
        && panel.sessionContext.session?.kernel?.status === "idle";
}"""
EXECUTE = """command => {
    window.outcome = null;
    window.jupyterapp.commands.execute(command).then(() => { window.outcome = "done"; }, error => { window.outcome = String(error); });
}"""
ACTIVATE = """async index => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.deselectAll();
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, "center");
}"""
# On their first display sliders round their values to their steps, which can move an explorer before a key has.
QUIET = """explorer => {
    const busy = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status !== "idle";
    if (busy || explorer.innerHTML !== explorer.lastSeen) {
        explorer.lastSeen = explorer.innerHTML;
        explorer.quietSince = performance.now();
    }
    return performance.now() - explorer.quietSince > 1000;
}"""
# What an explorer shows, from before the first key until picture, words and what a screen reader says have all changed. The page's own
# clock runs from the last key, or for a menu from its choice, so that the time is the explorer's and not this process's.
WATCH = """explorer => {
    const look = () => {
        const picture = explorer.querySelector("img");
        return {picture: picture?.src, alt: picture?.alt, words: explorer.querySelector("p")?.textContent};
    };
    const watch = window.watch = {before: look(), after: look(), started: null, seconds: null};
    for (const kind of ["keydown", "change"])
        explorer.addEventListener(kind, () => { watch.started = performance.now(); }, {capture: true});
    new MutationObserver(() => {
        watch.after = look();
        const all = Object.keys(watch.before).every(part => watch.after[part] !== watch.before[part]);
        if (all && watch.seconds === null) watch.seconds = (performance.now() - watch.started) / 1000;
    }).observe(explorer, {subtree: true, childList: true, attributes: true, characterData: true});
}"""


NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine


@contextmanager
def serve(notebooks: Path, home: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a server on the folder ``notebooks``, with all its own files under ``home``, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython", "SFERD_LAB_RUNS": "runs",
    }  # fmt: skip
    # The explorers are what is tested: not their still figures, and with trained models.
    environment = {name: value for name, value in os.environ.items() if name not in ("SFERD_LAB_WIDGETS", "SFERD_LAB_TINY")}
    environment |= {name: str(home / folder) for name, folder in own.items()}
    address, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    options = [
        "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]  # fmt: skip
    # Nor should it ask whether to look for news: the question would lie over the cells.
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}')
    log = home / "server.log"
    command = [sys.executable, "-m", "jupyterlab", *options]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=notebooks, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        until = time.monotonic() + START
        while not is_up(address, token):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"JupyterLab did not start within {START} s; its last words, from {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield address, token
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(address: str, token: str, method: str = "GET") -> Any:
    """What the server answers; None if that is nothing."""
    request = urllib.request.Request(address, headers={"Authorization": f"token {token}"}, method=method)
    with NO_PROXY.open(request, timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def is_up(address: str, token: str) -> bool:
    """Whether the server answers."""
    try:
        return "started" in ask(f"{address}/api/status", token)
    except OSError:
        return False


@dataclass(frozen=True)
class Moved:
    """``picture``, ``alt`` and ``words`` of an explorer before and after the keys; the seconds are None if not all of them changed."""

    keys: str
    control: str
    before: dict[str, str]
    after: dict[str, str]
    seconds: float | None


class Notebook:
    """An open notebook. Cells are counted from 0, text included."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def execute(self, command: str) -> None:
        """Run a command of JupyterLab's, such as a menu offers, until all it started in the kernel is done."""
        self.page.evaluate(EXECUTE, command)
        self.page.wait_for_function("window.outcome !== null", timeout=RUN * 1000)
        if (outcome := self.page.evaluate("window.outcome")) != "done":
            raise RuntimeError(f"{command}: {outcome}")

    def cells(self) -> list[dict[str, Any]]:
        """The cells as a file would have them, outputs included."""
        return self.page.evaluate("window.jupyterapp.shell.currentWidget.context.model.toJSON().cells")

    def activate(self, index: int) -> Locator:
        """Make a cell the active one, in view."""
        self.page.evaluate(ACTIVATE, index)
        return self.page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{index}']")

    def run_until(self, index: int) -> Locator:
        """Run all cells above one, and it."""
        cell = self.activate(index)
        self.execute("notebook:run-all-above")
        self.activate(index)
        self.execute("notebook:run-cell")
        return cell

    def write(self, cell: Locator, text: str) -> None:
        """Put ``text`` in place of a cell's, in its editor, as a learner would who selects all and pastes."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)
        self.page.wait_for_function(
            "text => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.getSource() === text", arg=text
        )

    def explorers(self, cell: Locator, count: int) -> list[Locator]:
        """The explorers in a cell's output, once there are ``count`` with their pictures drawn."""
        shown = cell.locator(".jp-OutputArea-output > .jupyter-widgets")
        found = shown.filter(has=self.page.locator("img")).filter(has=self.page.locator("p"))
        found.nth(count - 1).wait_for(timeout=START * 1000)
        for explorer in (explorers := found.all()):
            self.drawn(explorer)
        return explorers

    def drawn(self, explorer: Locator) -> None:
        """Wait until the browser has decoded an explorer's picture."""
        picture = explorer.locator("img").first.element_handle(timeout=START * 1000)
        self.page.wait_for_function("picture => picture.complete && picture.naturalWidth > 0", arg=picture, timeout=START * 1000)

    def move(self, explorer: Locator) -> Moved:
        """Move an explorer's first control, slider or menu, by one step of its own, with the arrow keys."""
        control = explorer.locator(".noUi-handle, select").first
        described = control.evaluate("control => control.closest('.jupyter-widgets').querySelector('.widget-label').textContent")
        if control.evaluate("control => control.tagName") == "SELECT":
            last = control.evaluate("control => control.selectedIndex === control.options.length - 1")
            # An arrow alone is JupyterLab's, which goes to the next cell; in an open menu it is the menu's.
            keys = ("Space", "ArrowUp" if last else "ArrowDown", "Enter")
        else:
            last = control.evaluate("control => control.getAttribute('aria-valuenow') === control.getAttribute('aria-valuemax')")
            keys = ("ArrowLeft" if last else "ArrowRight",)
        self.page.wait_for_function(QUIET, arg=explorer.element_handle(), timeout=START * 1000)
        explorer.evaluate(WATCH)
        control.focus()
        for key in keys:
            self.page.keyboard.press(key)
        with suppress(TimeoutError):  # what has not changed is for the test to say
            self.page.wait_for_function("window.watch.seconds !== null", timeout=2 * RESPONSE * 1000)
        self.drawn(explorer)
        watch = self.page.evaluate("window.watch")
        return Moved(", ".join(keys), described, watch["before"], watch["after"], watch["seconds"])


@dataclass(frozen=True)
class Lab:
    """A server and a browser; ``folder`` is for the pictures of what went wrong."""

    browser: Browser
    address: str
    token: str
    folder: Path

    @contextmanager
    def open(self, name: str) -> Iterator[Notebook]:
        """A notebook in a window of its own, its kernel ready and its saved outputs cleared. A failure inside the block has a picture."""
        context = self.browser.new_context(viewport={"width": 1200, "height": 900})
        page = context.new_page()
        try:
            # A workspace of its own, or JupyterLab would open the notebooks of the last one again.
            page.goto(f"{self.address}/lab/workspaces/{Path(name).stem}/tree/{name}?token={self.token}", timeout=START * 1000)
            page.wait_for_function(READY, arg=name, timeout=START * 1000)
            notebook = Notebook(page)
            notebook.execute("notebook:clear-all-cell-outputs")
            yield notebook
        except BaseException as error:
            picture = self.folder / f"{Path(name).stem}.png"
            try:
                page.screenshot(path=picture)
                error.add_note(f"what the browser showed: {picture}")
            except Error as second:
                error.add_note(f"no picture of the browser: {second}")
            raise
        finally:
            context.close()
            for session in ask(f"{self.address}/api/sessions", self.token):
                ask(f"{self.address}/api/sessions/{session['id']}", self.token, "DELETE")
