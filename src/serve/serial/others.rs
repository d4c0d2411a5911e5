//! Who else has a serial port open: a login prompt, or a program that looks for modems. Bytes go to whoever reads first,
//! so both ends get rubbish, and neither lock nor exclusive mode keeps away what runs as root.

use std::fs;
use std::path::Path;

use crate::error::{Error, Kind};

/// The unit that has a login prompt on a Jetson's serial port, and where its processes are listed, with cgroup v2 and v1.
const NVGETTY: [&str; 2] = [
    "sys/fs/cgroup/system.slice/nvgetty.service",
    "sys/fs/cgroup/systemd/system.slice/nvgetty.service",
];
/// The ports that it has one on.
const NVGETTY_PORTS: &str = "ttyTHS";
/// The ports that ModemManager tries out.
const MODEM_PORTS: [&str; 2] = ["ttyUSB", "ttyACM"];

/// A process by its command line.
struct Process {
    program: String,
    arguments: Vec<String>,
}

/// Who beside the daemon uses the terminal `device`, of the system whose files lie under `root`, and what helps; none
/// if nobody is known to.
pub fn other_user(root: &Path, device: &Path) -> Option<Error> {
    let found = fs::canonicalize(device);
    let found = found.as_deref().unwrap_or(device);
    let port = found.file_name()?.to_str()?;
    let processes = processes(root);
    let error = |what: String, remedy: String| Some(Error::new(Kind::Io, what, remedy));
    let mut gettys = processes.iter().filter(|p| p.program.ends_with("getty"));
    let on_port = |p: &Process, port: &str| p.arguments.iter().any(|a| name(a) == port);
    let nvgetty = NVGETTY.iter().any(|unit| root.join(unit).exists());
    let what = format!("a login prompt has {} open as well", device.display());
    if gettys.clone().any(|p| on_port(p, port)) {
        let unit = match nvgetty && port.starts_with(NVGETTY_PORTS) {
            true => "nvgetty".to_owned(),
            false => format!("serial-getty@{port}"),
        };
        return error(what, format!("sudo systemctl disable --now {unit}"));
    }
    // Somebody who is logged in has taken the prompt's place. It is on one of these ports.
    let of_nvgetty = |p: &Process| {
        p.arguments
            .iter()
            .any(|a| name(a).starts_with(NVGETTY_PORTS))
    };
    if nvgetty && port.starts_with(NVGETTY_PORTS) && !gettys.any(of_nvgetty) {
        return error(what, "sudo systemctl disable --now nvgetty".into());
    }
    let mut programs = processes.iter().map(|p| p.program.as_str());
    if MODEM_PORTS.iter().any(|ports| port.starts_with(ports))
        && programs.any(|program| program == "ModemManager")
    {
        return error(
            format!("ModemManager tries out ports like {}", device.display()),
            "sudo systemctl disable --now ModemManager, or set ID_MM_DEVICE_IGNORE=1 for the port in a udev rule".into(),
        );
    }
    None
}

/// All processes whose command lines may be read, which are all.
fn processes(root: &Path) -> Vec<Process> {
    let entries = fs::read_dir(root.join("proc")).into_iter().flatten();
    let process = |entry: fs::DirEntry| {
        let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let mut words = line.split('\0').map(str::to_owned);
        Some(Process {
            program: name(&words.next()?).to_owned(),
            arguments: words.collect(),
        })
    };
    entries.flatten().filter_map(process).collect()
}

/// What stands behind the last slash.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_prompt_is_found_on_its_own_port_and_named_by_its_unit() {
        let root = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        let remedy = |device: &str| {
            let found = other_user(root.path(), Path::new(device));
            found.map(|error| error.remedy().to_owned())
        };
        write("proc/12/cmdline", "/usr/sbin/sshd\0-D\0");
        assert_eq!(remedy("/dev/ttyTHS1"), None);
        write("proc/34/cmdline", "/sbin/agetty\0-L\0ttyS0\0vt220\0");
        let of_s0 = remedy("/dev/ttyS0").expect("found");
        assert!(of_s0.ends_with("serial-getty@ttyS0"), "{of_s0}");
        assert_eq!(remedy("/dev/ttyS1"), None);

        write(
            "sys/fs/cgroup/system.slice/nvgetty.service/cgroup.procs",
            "56\n",
        );
        let logged_in = remedy("/dev/ttyTHS1").expect("on one of these");
        assert!(logged_in.ends_with("nvgetty"), "{logged_in}");
        write("proc/56/cmdline", "/sbin/agetty\0-L\0/dev/ttyTHS0\0");
        assert_eq!(remedy("/dev/ttyTHS1"), None);
        let of_ths0 = remedy("/dev/ttyTHS0").expect("found");
        assert!(of_ths0.ends_with("nvgetty"), "{of_ths0}");

        assert_eq!(remedy("/dev/ttyUSB0"), None);
        write("proc/78/cmdline", "/usr/sbin/ModemManager\0");
        assert!(remedy("/dev/ttyUSB0").is_some_and(|remedy| remedy.contains("ModemManager")));
        assert_eq!(remedy("/dev/ttyTHS1"), None);
    }
}
