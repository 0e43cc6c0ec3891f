//! `engobe fetch`

use crate::args::FetchArgs;
use crate::terminal::{Note, print, print_json};
use crate::{fetch, hub};
use anyhow::{Result, bail};
use serde_json::json;

/// Gets a model into the cache and says where it lies.
pub fn run(args: &FetchArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let path = match fetch::known(&args.model) {
        Some(known) => {
            let cache = fetch::cache_dir(args.common.cache_dir.as_deref())?;
            let path = fetch::fetch(known, &cache, args.common.offline, &mut |line| note.line(line))?;
            fetch::verify(known, &path)?;
            path
        }
        None if hub::is_hub_id(&args.model) => {
            hub::download(&args.model, &hub::HubOptions { offline: args.common.offline })?
        }
        None => {
            bail!("{}: no known model ({}), and not a hub id (org/name)", args.model, fetch::known_names())
        }
    };
    match args.common.json {
        true => print_json(&json!({ "model": args.model, "path": path })),
        false => print(&format!("{}\n", path.display())),
    }
}
