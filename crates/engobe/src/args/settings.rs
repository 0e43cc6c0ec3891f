//! Settings: a file, any by its name, and a flag for each.

use crate::keys::{KEYS, Kind, ON_BY_DEFAULT};
use crate::settings::Given;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use std::path::PathBuf;

/// The settings of a run, as typed.
#[derive(Debug, Args)]
pub struct SettingArgs {
    /// TOML file of settings, as runs write to OUT/run.toml; flags override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Any setting by its name (rank_pattern='{ "q_proj" = 4 }')
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub flags: SettingFlags,
}

impl SettingArgs {
    /// The file's settings, and over them what was typed.
    pub fn given(&self) -> anyhow::Result<Given> {
        Given::collect(self.config.as_deref(), &self.flags.given, &self.set)
    }
}

/// A flag for each setting, made from the table of settings.
#[derive(Clone, Debug, Default)]
pub struct SettingFlags {
    /// name of the setting, and what was typed
    pub given: Vec<(String, String)>,
}

impl Args for SettingFlags {
    fn augment_args(mut command: Command) -> Command {
        for key in KEYS.iter() {
            let arg = Arg::new(key.name).long(key.flag()).help(key.help).help_heading(key.heading);
            let arg = match key.kind {
                Kind::Flag => arg
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true")
                    .value_name("BOOL")
                    .hide_possible_values(true),
                Kind::Names | Kind::Wholes => arg.action(ArgAction::Append).value_name("A,B"),
                Kind::Whole => arg.value_name("N"),
                Kind::Number | Kind::NumberOrTable => arg.value_name("X"),
                Kind::Table => arg.value_name("TABLE"),
                Kind::Text | Kind::FlagOrText | Kind::NumberOrText => arg.value_name("TEXT"),
            };
            // numbers may be negative: the error about them is ours
            let arg = arg.hide(key.hidden);
            command = command.arg(arg.allow_hyphen_values(matches!(key.kind, Kind::Whole | Kind::Number)));
        }
        for name in ON_BY_DEFAULT {
            if let Some(key) = crate::keys::find(name) {
                let off = Arg::new(format!("no_{name}"))
                    .long(format!("no-{}", key.flag()))
                    .help(format!("turn --{} off", key.flag()));
                command = command
                    .arg(off.action(ArgAction::SetTrue).conflicts_with(key.name).help_heading(key.heading));
            }
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for key in KEYS.iter() {
            for value in matches.get_many::<String>(key.name).into_iter().flatten() {
                given.push((key.name.to_string(), value.clone()));
            }
        }
        for name in ON_BY_DEFAULT {
            if matches.get_flag(&format!("no_{name}")) {
                given.push((name.to_string(), "false".to_string()));
            }
        }
        Ok(Self { given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
