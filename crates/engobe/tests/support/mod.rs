//! Runs the binary as a user does.

// each file of tests uses what it needs of this
#![allow(dead_code)]

use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file or directory in `golden/`.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(path)
}

/// engobe, with nothing of the caller's environment that changes what it does.
pub fn engobe(args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engobe"));
    command.args(args);
    for name in ["HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "ENGOBE_CACHE"] {
        command.env_remove(name);
    }
    command
}

/// What `--json` printed.
pub fn json(command: &mut Command) -> Value {
    let done = command.arg("--json").arg("--quiet").output().unwrap();
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap()
}

/// The one line of an error, and its exit status.
pub fn error(command: &mut Command) -> (i32, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("engobe:")).collect();
    assert_eq!(lines.len(), 1, "{command:?}\n{text}");
    assert!(!text.contains("mistake of ours"), "{text}");
    (status.code().unwrap(), lines[0].to_string())
}
