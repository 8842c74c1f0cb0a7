"""The report of a long run of many clients: how large it is, how fast it is written, how fast it can be used.

The run is a real one, under the virtual clock; the browser is headless Chromium. A page is usable when its
last figure is drawn and answers the mouse. Every opening is a new page in a warm browser.

    .venv/bin/python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _record import Bar, Material, fresh_folder, generated, make_console, make_parser, record, run_quietly
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.report.write import write_report

PATIENCE_S = 60


def main() -> None:
    options = parse_options()
    console = make_console()
    folder = fresh_folder(options)
    config = make_config(generated(folder / "material", num_clients=options.clients), options)
    console.print(f"running {options.rounds} rounds of {options.clients} clients …")
    run_quietly(config, folder / "run")
    began = time.perf_counter()
    page = write_report([folder / "run"])
    written_s = time.perf_counter() - began
    drawn_s = open_page(page, options.repeats)
    results = {"bytes": page.stat().st_size, "written_s": written_s, "drawn_s": drawn_s}
    console.print(f"opened {options.repeats} times, drawn after {', '.join(f'{s:.2f}' for s in drawn_s)} s")
    bars = [
        Bar("bytes of report.html", results["bytes"], 5e6),
        Bar("seconds to write it", written_s, 1.0),
        Bar("seconds until it can be used, median", statistics.median(drawn_s), 2.0),
    ]
    record(options, results, bars, config=config.model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("report", "Size and speed of a report in Chromium.", "--rounds 200 --clients 10")
    parser.add_argument("--clients", type=int, default=20, help="clients of the run")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of the run")
    parser.add_argument("--repeats", type=int, default=5, help="how often the page is opened")
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.rounds, options.repeats = 2, 8, 1
    return options


def make_config(material: Material, options: argparse.Namespace) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"name_or_path": material.model},
        "data": {
            "train": material.train,
            "test": material.test,
            "max_length": 64,
            "partition": {"scheme": "by_file"},
        },
        "federation": {"num_clients": options.clients, "num_rounds": options.rounds, "delay": 1},
        "train": {"num_local_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "link": {"upload_mbps": 20, "download_mbps": 40, "latency_s": 0.005},
        "engine": {"clock": "virtual", "num_threads": 1},
        "evaluation": {"every_rounds": 8, "max_examples": 8},
        "checkpoint": {"every_rounds": 0},
    }
    return parse_config(tree)


def open_page(page: Path, repeats: int) -> list[float]:
    """Open a page a few times; give the seconds from navigation to the last figure."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("Chromium is missing: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        return [_drawn_s(browser, page) for _ in range(repeats)]
    finally:
        browser.quit()


def _drawn_s(browser: webdriver.Chrome, page: Path) -> float:
    browser.get("about:blank")
    browser.get(page.resolve().as_uri())
    drawn = "return performance.getEntriesByName('drawn')[0]?.startTime"
    return float(WebDriverWait(browser, PATIENCE_S).until(lambda driven: driven.execute_script(drawn))) / 1000


if __name__ == "__main__":
    main()
