//! How much memory the process holds.

/// Resident bytes now, if the system says.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:").or_else(from_task)
}

/// Most resident bytes so far, if the system says.
pub fn peak_resident_bytes() -> Option<u64> {
    status("VmHWM:").or_else(from_rusage)
}

/// A line of Linux' `/proc/self/status`. (`getrusage` would count what the parent held before `exec`.)
fn status(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn from_rusage() -> Option<u64> {
    use nix::sys::resource::{UsageWho, getrusage};
    let max = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
    // macOS counts bytes, the BSDs KiB
    Some(if cfg!(target_os = "macos") { max } else { max * 1024 })
}

/// Where there is no `/proc`, the most so far stands for what is held now: our heap keeps what it once had.
fn from_task() -> Option<u64> {
    from_rusage()
}

#[cfg(any(not(unix), target_os = "linux"))]
fn from_rusage() -> Option<u64> {
    None
}

/// `1.2 GB` and the like.
pub fn bytes_text(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.0} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.0} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in
            [(12, "12 B"), (4_200, "4 kB"), (92_900_000, "93 MB"), (1_234_000_000, "1.23 GB")]
        {
            assert_eq!(bytes_text(bytes), text);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_is_no_less_than_now() {
        let now = resident_bytes().unwrap();
        assert!(now > 0 && peak_resident_bytes().unwrap() >= now);
    }
}
