package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

const (
	mainFile = "/etc/containerd/config.toml"
	// The name is the last one of most folders, because a later file wins.
	dropInFile = "/etc/containerd/conf.d/zz-lazuli.toml"
	// The import is a pattern, because containerd does not start if a file that it imports by name is missing. It matches
	// our file only, because what else lies in conf.d may never have been read so far.
	importPattern = "/etc/containerd/conf.d/*lazuli.toml"

	blockBegin = "# lazuli install: begin"
	blockEnd   = "# lazuli install: end"
	blockWas   = "# before: "
	written    = "# Written by lazuli install. lazuli uninstall removes it.\n"
)

// Names of containerd's plugins.
const (
	criImages = "io.containerd.cri.v1.images" // 2.x
	criV2     = "io.containerd.grpc.v1.cri"   // 1.x, version 2
	criV1     = "cri"                         // 1.x, version 1
	transfer  = "io.containerd.transfer.v1.local"
)

// A containerd is one that is installed below a root directory, and how it merges its configuration: it is asked, never guessed.
type containerd struct {
	program string
	version string // "2.4.2"
	dest    string
}

// find finds the containerd that reads the configuration below dest: one that lies there, or else the one in PATH.
func find(ctx context.Context, dest string) (*containerd, error) {
	c := &containerd{dest: dest}
	if dest != "" {
		for _, dir := range []string{"/usr/local/bin", "/usr/bin"} {
			if p, err := exec.LookPath(filepath.Join(dest, dir, "containerd")); err == nil {
				c.program = p
				break
			}
		}
	}
	if c.program == "" {
		p, err := exec.LookPath("containerd")
		if err != nil {
			return nil, errors.New("no containerd in PATH: install containerd first, its version decides what its configuration looks like")
		}
		c.program = p
	}
	out, err := exec.CommandContext(ctx, c.program, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", c.program, err)
	}
	if f := strings.Fields(string(out)); len(f) > 2 { // containerd MODULE VERSION COMMIT
		c.version = f[2]
	}
	return c, nil
}

// A tree is TOML.
type tree = map[string]any

// A view is the node's files with some of them changed: by path, nil for one that is removed.
type view map[string][]byte

func (c *containerd) read(v view, path string) ([]byte, error) {
	if b, ok := v[path]; ok {
		if b == nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		}
		return b, nil
	}
	return os.ReadFile(filepath.Join(c.dest, path))
}

// A source is a configuration file that containerd reads.
type source struct {
	path string
	tree tree
}

// load reads the main file and all that it imports, in containerd's order: a later file overrides an earlier one. There are none if there is
// no main file.
func (c *containerd) load(v view) ([]source, error) {
	var out []source
	seen := map[string]bool{}
	for pending := []string{mainFile}; len(pending) > 0; {
		path := pending[0]
		pending = pending[1:]
		if seen[path] {
			continue
		}
		seen[path] = true
		b, err := c.read(v, path)
		if errors.Is(err, fs.ErrNotExist) && path == mainFile {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		s := source{path, tree{}}
		if err := toml.Unmarshal(b, &s.tree); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, s)
		for _, pattern := range imports(s.tree) {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			if !strings.Contains(pattern, "*") {
				pending = append(pending, filepath.Clean(pattern))
				continue
			}
			matches, err := c.glob(v, pattern)
			if err != nil {
				return nil, fmt.Errorf("%s: imports %q: %w", path, pattern, err)
			}
			pending = append(pending, matches...)
		}
	}
	return out, nil
}

func imports(t tree) []string {
	var out []string
	list, _ := t["imports"].([]any)
	for _, i := range list {
		if s, ok := i.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

func (c *containerd) glob(v view, pattern string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(c.dest, pattern))
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, f := range found {
		if c.dest != "" {
			f = "/" + strings.TrimPrefix(strings.TrimPrefix(f, filepath.Clean(c.dest)), "/")
		}
		set[f] = true
	}
	for f, b := range v {
		if ok, _ := filepath.Match(pattern, f); ok {
			set[f] = b != nil
		}
	}
	maps.DeleteFunc(set, func(_ string, is bool) bool { return !is })
	return slices.Sorted(maps.Keys(set)), nil
}

// dump returns what containerd makes of files.
func (c *containerd) dump(ctx context.Context, files []source) (tree, error) {
	dir, err := os.MkdirTemp("", "lazuli-install-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if len(files) == 0 {
		files = []source{{tree: tree{"version": int64(2)}}}
	}
	// The files are read by their places here, so no import of theirs is followed; the first one imports all the others.
	var paths []string
	for i := range files {
		paths = append(paths, filepath.Join(dir, fmt.Sprintf("%03d.toml", i)))
	}
	for i, f := range files {
		t := maps.Clone(f.tree)
		delete(t, "imports")
		if i == 0 && len(paths) > 1 {
			t["imports"] = paths[1:]
		}
		b, err := toml.Marshal(t)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.path, err)
		}
		if err := os.WriteFile(paths[i], b, 0o600); err != nil {
			return nil, err
		}
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.program, "--config", paths[0], "config", "dump")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		said := lines(bytes.TrimSpace(stderr.Bytes()))
		if len(said) > 0 {
			err = fmt.Errorf("%w: %s", err, said[len(said)-1])
		}
		return nil, err
	}
	t := tree{}
	if err := toml.Unmarshal(out, &t); err != nil {
		return nil, fmt.Errorf("%s config dump: %w", c.program, err)
	}
	return t, nil
}

// at returns the value below t at keys, nil if there is none.
func at(t any, keys ...string) any {
	for _, k := range keys {
		m, _ := t.(tree)
		t = m[k]
	}
	return t
}

// A wish is what containerd's configuration has to say.
type wish struct {
	socket, root string
	cri          bool
}

// A merge is where the wish goes.
type merge struct {
	dropIn  string // path
	content []byte
	main    []byte // nil if the main file stays as it is
}

// merge finds a drop-in file, and if it must be a change of the main file, with which containerd's effective configuration becomes
// what it was and the wish, no more and no less.
//
// What a file can say depends on the version of containerd (1.x replaces a plugin's whole section by that of a later
// file, 2.x merges them) and on the configuration version of the main file, in ways that differ between minor versions. So the possible
// files are tried, the shortest first, and containerd itself says what it makes of each.
func (c *containerd) merge(ctx context.Context, w wish) (*merge, error) {
	raw, err := c.read(nil, mainFile)
	absent := errors.Is(err, fs.ErrNotExist)
	if err != nil && !absent {
		return nil, err
	}
	main := withoutBlock(raw)
	if absent {
		defaults, err := c.dump(ctx, nil)
		if err != nil {
			return nil, fmt.Errorf("containerd config dump: %w", err)
		}
		main = []byte("version = 2\n")
		if at(defaults, "version") != int64(2) { // not 1.x, which does not know 3
			main = []byte("version = 3\n")
		}
	}
	m := &merge{}
	m.dropIn, m.main, err = c.place(main)
	if err != nil {
		return nil, err
	}
	switch old, err := c.read(nil, m.dropIn); {
	case err == nil && !bytes.HasPrefix(old, []byte(written)):
		return nil, fmt.Errorf("%s was not written by lazuli install: move it away first", m.dropIn)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}

	v := view{mainFile: main, m.dropIn: nil}
	files, err := c.load(v)
	if err != nil {
		return nil, fmt.Errorf("containerd's configuration: %w", err)
	}
	before, err := c.dump(ctx, files)
	if err != nil {
		return nil, fmt.Errorf("containerd does not accept its configuration as it is now (containerd config dump): %w", err)
	}
	if w.cri && criSection(before) == "" {
		return nil, fmt.Errorf("containerd's CRI plugin is disabled (disabled_plugins in %s): enable it, or install without --cri", mainFile)
	}
	if m.main != nil {
		v[mainFile] = m.main
	}
	want := w.want(before)
	version, _ := files[0].tree["version"].(int64)
	var byHand []byte
	var why error
	for _, t := range w.candidates(before, want, files, version) {
		content, err := render(t)
		if err != nil {
			return nil, err
		}
		v[m.dropIn] = content
		files, err := c.load(v)
		if err != nil {
			return nil, err
		}
		after, err := c.dump(ctx, files)
		if err == nil {
			err = w.compare(before, after, want)
		}
		if err == nil {
			m.content = content
			if m.main == nil {
				m.main = main
			}
			if bytes.Equal(m.main, raw) && !absent {
				m.main = nil
			}
			return m, nil
		}
		if why == nil {
			byHand, why = content, err
		}
	}
	return nil, fmt.Errorf("with %s containerd %s would not do what it should: %w\n"+
		"Say the following in containerd's configuration, and then run lazuli install --no-containerd\n\n%s", m.dropIn, c.version, why, bare(byHand))
}

// withoutBlock returns the main file without our lines: byte for byte what it was.
func withoutBlock(b []byte) []byte {
	before, rest, ok := strings.Cut(string(b), blockBegin+"\n")
	if !ok {
		return b
	}
	ours, after, ok := strings.Cut(rest, blockEnd+"\n")
	if !ok {
		return b
	}
	was := ""
	for _, l := range strings.SplitAfter(ours, "\n") {
		if s, ok := strings.CutPrefix(l, blockWas); ok {
			was = s
		}
	}
	return []byte(before + was + after)
}

var (
	// What remains of a main file that we made.
	versionLine = regexp.MustCompile(`^version = \d\n$`)
	importsKey  = regexp.MustCompile(`(?m)^[ \t]*["']?imports["']?[ \t]*=.*\n?`)
)

// place chooses where the drop-in goes, and returns the main file with a line that imports it, or nil if it does so already.
func (c *containerd) place(main []byte) (dropIn string, changed []byte, err error) {
	var t tree
	if err := toml.Unmarshal(main, &t); err != nil {
		return "", nil, fmt.Errorf("%s: %w", mainFile, err)
	}
	list := imports(t)
	for _, pattern := range list {
		// containerd 1.6 looks for relative patterns in its working directory, so those are no place.
		if ok, _ := filepath.Match(pattern, dropInFile); ok && filepath.IsAbs(pattern) {
			return dropInFile, nil, nil
		}
	}
	for _, pattern := range list {
		dir, name := filepath.Split(pattern)
		if ok, _ := filepath.Match(name, filepath.Base(dropInFile)); ok && filepath.IsAbs(pattern) && !strings.Contains(dir, "*") {
			return dir + filepath.Base(dropInFile), nil, nil
		}
	}
	if _, ok := t["imports"]; !ok {
		// A key before the first table belongs to no table, wherever that is.
		return dropInFile, slices.Concat(block(""), main), nil
	}
	// There is a list already, and TOML has no two of one key. One that stands on a line of its own can give way.
	if at := importsKey.FindAllIndex(main, -1); len(at) == 1 {
		line := string(main[at[0][0]:at[0][1]])
		var alone, rest tree
		without := slices.Concat(main[:at[0][0]], main[at[0][1]:])
		if toml.Unmarshal([]byte(line), &alone) == nil && reflect.DeepEqual(alone["imports"], t["imports"]) &&
			toml.Unmarshal(without, &rest) == nil && strings.HasSuffix(line, "\n") && rest["imports"] == nil {
			delete(t, "imports")
			if reflect.DeepEqual(rest, t) {
				return dropInFile, slices.Concat(main[:at[0][0]], block(line, list...), main[at[0][1]:]), nil
			}
		}
	}
	return "", nil, fmt.Errorf("%s: its imports cannot be changed safely: add %q to them by hand, and run lazuli install again",
		mainFile, importPattern)
}

// block is what is added to the main file: the import in place of the line was, or of none, with the imports that it had.
func block(was string, had ...string) []byte {
	var b bytes.Buffer
	fmt.Fprintln(&b, blockBegin)
	b.WriteString("imports = [")
	for _, i := range append(had, importPattern) {
		fmt.Fprintf(&b, "%q, ", i)
	}
	b.Truncate(b.Len() - len(", "))
	b.WriteString("]\n")
	if was != "" {
		b.WriteString(blockWas + was)
	}
	fmt.Fprintln(&b, blockEnd)
	return b.Bytes()
}

// criSection is the name of the section in a dump that says which snapshotter Kubernetes' images get, "" if there is none.
func criSection(dump tree) string {
	for _, name := range []string{criImages, criV2} {
		if at(dump, "plugins", name) != nil {
			return name
		}
	}
	return ""
}

// A wanted is what a dump must have besides the proxy plugin.
type wanted struct {
	unpack []any // of the transfer service; nil if it has no such list
	cri    tree  // keys of the section of criSection; for criV2, of its table containerd
}

func (w wish) want(before tree) wanted {
	var want wanted
	// ctr and nerdctl, and from 2.1 on CRI, pull through the transfer service, which unpacks only for snapshotters that it has in its list. A
	// list in a file replaces the default, so what it had comes along.
	if section, ok := at(before, "plugins", transfer).(tree); ok {
		list, ok := section["unpack_config"].([]any)
		if !ok {
			// 2.2 and later do not print their default.
			list = []any{tree{"platform": "linux", "snapshotter": "overlayfs", "differ": "walking"}}
			if at(before, "plugins", "io.containerd.snapshotter.v1.erofs") != nil {
				list = append(list, tree{"platform": "linux(+erofs)/" + runtime.GOARCH, "snapshotter": "erofs", "differ": "erofs", "optional": true})
			}
		}
		want.unpack = append(slices.Clone(list), tree{"platform": "linux", "snapshotter": "lazuli", "differ": "walking"})
	}
	if w.cri {
		want.cri = tree{"snapshotter": "lazuli"}
		// Without its annotations a snapshotter is not told which layer a snapshot is of. The transfer service adds them when the
		// proxy plugin's exports ask for it, and CRI leaves the transfer service when it is to add them itself; so it is told to only where
		// it pulls by itself anyway.
		images, _ := at(before, "plugins", criImages).(tree)
		if pullsItself(images) {
			want.cri["disable_snapshot_annotations"] = false
		}
	}
	return want
}

// pullsItself says whether CRI with this section (criImages) pulls without the transfer service: before 2.1 always, then if asked to or if
// something is configured that the transfer service cannot do (containerd's internal/cri/config, CheckLocalImagePullConfigs).
func pullsItself(images tree) bool {
	local, has := images["use_local_image_pull"].(bool)
	if !has || local {
		return true
	}
	for _, key := range []string{"discard_unpacked_layers", "image_pull_with_sync_fs"} {
		if on, _ := images[key].(bool); on {
			return true
		}
	}
	for _, key := range []string{"mirrors", "configs", "auths"} {
		if t, _ := at(images, "registry", key).(tree); len(t) > 0 {
			return true
		}
	}
	annotations, ok := images["disable_snapshot_annotations"].(bool)
	return images["max_concurrent_downloads"] != int64(3) || ok && !annotations
}

// candidates are drop-in files that may have the effect that is wanted, the best first. version is that of the main file: a
// drop-in of another version keeps some containerds from migrating the main file.
func (w wish) candidates(before tree, want wanted, files []source, version int64) []tree {
	base := func(version int64) tree {
		t := tree{"proxy_plugins": tree{"lazuli": tree{
			"type": "snapshot", "address": w.socket,
			"exports": tree{"root": w.root, "enable_remote_snapshot_annotations": "true"},
		}}}
		if version > 0 {
			t["version"] = version
		}
		plugins := tree{}
		if want.unpack != nil {
			plugins[transfer] = tree{"unpack_config": want.unpack}
		}
		if len(plugins) > 0 || want.cri != nil {
			t["plugins"] = plugins
		}
		return t
	}
	if want.cri == nil {
		return []tree{base(version)}
	}
	with := func(version int64, name string, section tree) tree {
		t := base(version)
		t["plugins"].(tree)[name] = section
		return t
	}
	name := criV2
	if version < 2 {
		name = criV1
	}
	if criSection(before) == criImages {
		// containerd moves these keys from the old section to the new one only if it finds a table of runtimes.
		old := maps.Clone(want.cri)
		old["runtimes"] = tree{}
		return []tree{
			with(version, criImages, want.cri),
			with(version, name, tree{"containerd": old}),
			with(3, criImages, want.cri),
		}
	}
	// 1.x: of all files' sections the last one counts, alone.
	var whole tree
	for _, f := range files {
		if s, ok := at(f.tree, "plugins", name).(tree); ok {
			whole = maps.Clone(s)
		}
	}
	out := []tree{with(version, name, tree{"containerd": want.cri})}
	if whole != nil {
		inner, _ := whole["containerd"].(tree)
		inner = maps.Clone(inner)
		if inner == nil {
			inner = tree{}
		}
		maps.Copy(inner, want.cri)
		whole["containerd"] = inner
		out = append(out, with(version, name, whole))
	}
	return out
}

// compare says how after differs from before and what was wanted.
func (w wish) compare(before, after tree, want wanted) error {
	if got := at(after, "proxy_plugins", "lazuli", "address"); got != w.socket {
		return fmt.Errorf("the snapshotter's address would be %v, a file that is read later says so", got)
	}
	after, before = clone(after).(tree), clone(before).(tree)
	if want.unpack != nil {
		got, _ := at(after, "plugins", transfer, "unpack_config").([]any)
		for _, u := range want.unpack {
			if !slices.ContainsFunc(got, func(g any) bool { return covers(g, u) }) {
				return fmt.Errorf("the transfer service would not unpack for %v", at(u, "snapshotter"))
			}
		}
		for _, t := range []tree{before, after} {
			delete(at(t, "plugins", transfer).(tree), "unpack_config")
		}
	}
	if want.cri != nil {
		section := func(t tree) tree {
			name := criSection(t)
			s, _ := at(t, "plugins", name).(tree)
			if name == criV2 {
				s, _ = s["containerd"].(tree)
			}
			return s
		}
		got := section(after)
		if !covers(got, want.cri) {
			return fmt.Errorf("the CRI plugin would use the snapshotter %v, with disable_snapshot_annotations = %v",
				got["snapshotter"], got["disable_snapshot_annotations"])
		}
		for k := range want.cri {
			delete(section(before), k)
			delete(got, k)
		}
	}
	for _, t := range []tree{before, after} {
		delete(t, "imports")
		p, _ := t["proxy_plugins"].(tree)
		delete(p, "lazuli")
		if len(p) == 0 {
			delete(t, "proxy_plugins")
		}
	}
	if path, a, b := difference(before, after, ""); path != "" {
		return fmt.Errorf("%s would change from %v to %v", path, a, b)
	}
	return nil
}

// covers says whether a has all keys that b has, with the same values.
func covers(a, b any) bool {
	x, _ := a.(tree)
	for k, v := range b.(tree) {
		if !reflect.DeepEqual(x[k], v) {
			return false
		}
	}
	return true
}

// difference returns the first place where a and b differ, "" if nowhere.
func difference(a, b any, path string) (string, any, any) {
	x, ok1 := a.(tree)
	y, ok2 := b.(tree)
	if !ok1 || !ok2 {
		if reflect.DeepEqual(a, b) {
			return "", nil, nil
		}
		return path, a, b
	}
	keys := maps.Clone(x)
	maps.Copy(keys, y)
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if p, a, b := difference(x[k], y[k], strings.TrimPrefix(path+"."+k, ".")); p != "" {
			return p, a, b
		}
	}
	return "", nil, nil
}

func clone(v any) any {
	switch v := v.(type) {
	case tree:
		out := tree{}
		for k, x := range v {
			out[k] = clone(x)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = clone(x)
		}
		return out
	}
	return v
}

// render writes a drop-in file.
func render(t tree) ([]byte, error) {
	t = maps.Clone(t)
	var b bytes.Buffer
	b.WriteString(written)
	if at(t, "plugins", transfer) != nil {
		b.WriteString("# The list unpack_config, for whom pulls are unpacked, replaces that of other files and\n# repeats their entries: run lazuli install again after changing those.\n")
	}
	if at(t, "plugins", criV2) != nil || at(t, "plugins", criV1) != nil {
		b.WriteString("# containerd 1.x reads one file's section of the CRI plugin only, so this one repeats what\n# other files say: run lazuli install again after changing those.\n")
	}
	// The version first, where people look for it.
	if v, ok := t["version"]; ok {
		fmt.Fprintf(&b, "version = %d\n\n", v)
		delete(t, "version")
	}
	e := toml.NewEncoder(&b)
	e.SetIndentTables(true)
	err := e.Encode(t)
	return b.Bytes(), err
}

// bare is a drop-in file without its comments.
func bare(content []byte) string {
	var b strings.Builder
	for _, l := range lines(content) {
		if !strings.HasPrefix(l, "#") && !strings.HasPrefix(l, "version") {
			fmt.Fprintln(&b, l)
		}
	}
	return strings.TrimSpace(b.String())
}
