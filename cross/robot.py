"""The emulated robot of cross/emulate: boots, gets the package, answers, is killed, loses power, and is cleaned.

    robot.py FOLDER AIRSTREAM MODEL     FOLDER has vmlinuz, initrd and drive.img; AIRSTREAM is the host's program
"""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

QUESTION = ["--temp", "0", "-n", "12", "Why is the sky blue?"]
BUDGET_MIB = 64
# What a process has beside its budget: the program, its libraries, stacks.
BESIDE_MIB = 24

started = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - started:6.0f} s] {text}", flush=True)


def check(holds, what):
    if not holds:
        raise SystemExit(f"failed: {what}")
    say(f"ok: {what}")


class Robot:
    """A machine with a processor like Orin's, 1 GiB of memory, an NVMe drive and a second serial port."""

    def __init__(self, folder, airstream):
        self.folder = Path(folder).resolve()
        self.airstream = airstream

    def power_on(self):
        """Boots, and waits for the shell."""
        port = self.folder / "host.sock"
        port.unlink(missing_ok=True)
        self.qemu = subprocess.Popen(
            ["qemu-system-aarch64", "-machine", "virt", "-cpu", "neoverse-n1", "-smp", "1", "-m", "1G"]
            + ["-nodefaults", "-display", "none", "-pidfile", "qemu.pid"]
            + ["-kernel", "vmlinuz", "-initrd", "initrd", "-append", "console=ttyAMA0"]
            + ["-drive", "file=drive.img,format=raw,if=none,id=drive", "-device", "nvme,serial=robot,drive=drive"]
            # The socket comes before the terminal, whose name is printed when both are there.
            + ["-chardev", f"socket,path={port},server=on,wait=off,id=host"]
            + ["-serial", "file:console.log", "-chardev", "pty,id=line", "-device", "pci-serial,chardev=line"]
            + ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=host,name=host"],
            cwd=self.folder, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )
        # "char device redirected to /dev/pts/3 (label line)"
        self.line = re.search(r"/dev/pts/\d+", self.qemu.stdout.readline())[0]
        self.port = socket.socket(socket.AF_UNIX)
        self.port.connect(str(port))
        self.shell("until systemctl is-system-running --wait | grep -E 'running|degraded'; do sleep 1; done", 600)
        say(f"up: {self.shell('uname -rm; systemd-analyze | head -1')}")

    def power_cut(self):
        """As when the plug is pulled: nothing that the guest has not written is on the drive."""
        self.qemu.kill()
        self.qemu.wait()
        self.port.close()

    def shell(self, command, seconds=120):
        """What a shell command of root's says; it has to succeed."""
        said, code = self.try_shell(command, seconds)
        if code != 0:
            raise SystemExit(f"failed with {code}: {command}\n{said}")
        return said

    def try_shell(self, command, seconds=120):
        """What a shell command of root's says, and its exit status."""
        self.port.settimeout(seconds)
        self.port.sendall(f"{{ {command}\n}} </dev/null 2>&1; printf '\\036%s\\n' $?\n".encode())
        said = b""
        try:
            while not (end := re.search(rb"\x1e(\d+)\n$", said)):
                got = self.port.recv(65536)
                if not got:
                    raise SystemExit(f"the machine is gone during: {command}")
                said += got
        except TimeoutError:
            raise SystemExit(f"no end after {seconds} s: {command}\n{said.decode(errors='replace')}")
        return said[: end.start()].decode(errors="replace").strip(), int(end[1])

    def unit(self, name):
        """A property of the unit."""
        return self.shell(f"systemctl show --value --property={name} airstream")

    def wait_ready(self, seconds=300):
        """Waits until the daemon has told systemd that it is ready."""
        self.shell("until systemctl is-active airstream; do sleep 1; done", seconds)

    def ask_socket(self):
        """The answer over the UNIX socket, asked on the robot."""
        words = " ".join(f"'{word}'" for word in QUESTION)
        return self.shell(f"airstream ask {words} 2>/dev/null", 600)

    def ask_serial(self):
        """The answer over the serial line, asked on the host."""
        asked = [self.airstream, "ask", "--serial", self.line, *QUESTION]
        return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout.strip()


def main(folder, airstream, model):
    run = [airstream, "run", "--model", model, "--ctx", "512", *QUESTION]
    expected = subprocess.run(
        run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout.strip()
    say(f"the host's answer: {expected}")
    robot = Robot(folder, airstream)
    robot.power_on()
    try:
        install(robot)
        answers(robot, expected)
        stays_in_budget(robot)
        doctor_agrees(robot)
        survives_a_kill(robot, expected)
        survives_a_power_cut(robot, expected)
        keeps_its_configuration(robot, expected)
        leaves_nothing(robot)
    finally:
        robot.power_cut()
    say("all is well")


def install(robot):
    robot.shell("dpkg -i /srv/robot/airstream.deb", 300)
    check(robot.unit("UnitFileState") == "enabled", "the package is installed, and its unit enabled")
    robot.shell(
        "cd /etc/airstream"
        f" && sed -i -e 's/^#memory = .*/memory = \"{BUDGET_MIB}MiB\"/' -e 's/^#context = .*/context = 512/'"
        " -e 's/^#sessions = .*/sessions = 2/' airstream.toml"
        " && printf '\\n[[serial]]\\ndevice = \"/dev/ttyS0\"\\n' >>airstream.toml"
        " && mv /srv/robot/*.gguf /var/lib/airstream/models/default.gguf"
    )
    begun = time.monotonic()
    said, code = robot.try_shell("systemctl start airstream", 300)
    if code != 0:
        raise SystemExit(f"{said}\n{robot.shell('journalctl --no-pager -u airstream | tail -n 40')}")
    check(robot.unit("StatusText") != "", f"the unit is ready after {time.monotonic() - begun:.0f} s")


def answers(robot, expected):
    begun = time.monotonic()
    check(robot.ask_socket() == expected, f"the socket gives the host's answer in {time.monotonic() - begun:.0f} s")
    begun = time.monotonic()
    check(robot.ask_serial() == expected, f"the serial line gives it in {time.monotonic() - begun:.0f} s")


def stays_in_budget(robot):
    status = robot.shell(f"cat /proc/{robot.unit('MainPID')}/status")
    peak_mib = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
    limit_mib = BUDGET_MIB + BESIDE_MIB
    check(peak_mib <= limit_mib, f"peak memory is {peak_mib:.1f} MiB of {BUDGET_MIB} + {BESIDE_MIB} MiB")


def doctor_agrees(robot):
    said, code = robot.try_shell(
        f"airstream doctor --json --memory {BUDGET_MIB}MiB --model /var/lib/airstream/models/default.gguf 2>/dev/null", 300
    )
    found = json.loads(said)
    for line in found["checks"]:
        say(f"doctor: {line['name']}: {line['status']}: {line['found']}")
    well = {line["name"] for line in found["checks"] if line["status"] == "ok"}
    check(code == 0 and found["broken"] == 0, "doctor finds nothing broken")
    check(well >= {"io_uring", "O_DIRECT", "unit", "socket"}, "io_uring and O_DIRECT are real on the NVMe drive")


def survives_a_kill(robot, expected):
    before = robot.unit("MainPID")
    robot.shell(f"kill -KILL {before}; while [ -e /proc/{before} ]; do sleep 0.2; done")
    robot.wait_ready()
    check(robot.unit("NRestarts") == "1" and robot.unit("MainPID") != before, "systemd brings a killed daemon back")
    check(robot.ask_socket() == expected, "which answers as before")


def survives_a_power_cut(robot, expected):
    asked = [robot.airstream, "ask", "--serial", robot.line, "--temp", "0", "-n", "200", "Tell me about the sea."]
    answer = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    begun = answer.stdout.read(20)
    check(len(begun) == 20 and answer.poll() is None, f"power is cut during an answer: {begun.decode()!r}..")
    robot.power_cut()
    answer.kill()
    answer.wait()
    robot.power_on()
    robot.wait_ready()
    check(robot.unit("NRestarts") == "0", "after it the daemon starts by itself, at the first try")
    check(robot.ask_serial() == expected, "and answers as before")


def keeps_its_configuration(robot, expected):
    before = robot.unit("MainPID")
    configuration = robot.shell("cat /etc/airstream/airstream.toml")
    # Both the administrator and the newer package have changed the file; the answer to dpkg's question is the default.
    robot.shell("dpkg --force-confold -i /srv/robot/newer.deb", 300)
    robot.wait_ready()
    check(robot.unit("MainPID") != before, "an upgrade restarts the daemon")
    check(robot.shell("cat /etc/airstream/airstream.toml") == configuration, "and keeps the configuration")
    check(robot.ask_socket() == expected, "and the answer")


def leaves_nothing(robot):
    robot.shell("dpkg --purge airstream", 300)
    left = robot.shell(
        "find / -xdev -path /srv/robot -prune -o -path '/var/log/*' -prune -o -name '*airstream*' -print;"
        " getent passwd airstream; getent group airstream; systemctl list-units --all --no-legend 'airstream*'; true"
    )
    check(left == "", f"purging leaves nothing behind{left and ': '}{left}")


if __name__ == "__main__":
    main(*sys.argv[1:])
