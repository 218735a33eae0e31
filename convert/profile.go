package convert

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"lazuli/fs/toc"
)

// ParseProfile reads a profile: the names of the files that a workload reads while it starts, one in each line
// in the order of their first use. A line is a path, or a JSON object whose "path" is one. Empty
// lines and those that begin with # are skipped. In an object other fields are
// ignored: the content of a file lies in a tar as a whole, so a file comes first as a whole.
//
// Names that come again are left out. The result has them without a leading slash.
func ParseProfile(r io.Reader) ([]string, error) {
	var names []string
	seen := map[string]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	n := 1
	for ; lines.Scan(); n++ {
		line := strings.TrimSuffix(lines.Text(), "\r")
		if trimmed := strings.TrimSpace(line); trimmed == "" || trimmed[0] == '#' {
			continue
		} else if trimmed[0] == '{' {
			var o struct{ Path *string }
			if err := json.Unmarshal([]byte(trimmed), &o); err != nil {
				return nil, fmt.Errorf("profile: line %d: %w", n, err)
			}
			if o.Path == nil {
				return nil, fmt.Errorf("profile: line %d: no path", n)
			}
			line = *o.Path
		}
		name := strings.TrimPrefix(path.Clean("/"+line), "/")
		if name != "" && !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("profile: line %d: %w", n, err)
	}
	return names, nil
}

// A spooledEntry is an entry of a tar that lies in a file.
type spooledEntry struct {
	entry      *toc.Entry
	header     int64 // offset of its headers in the file; the content follows
	headerSize int
	done       bool // written
}

// reorder is rewrite with the files of the profile first. A file keeps its place if moving it could
// change what the layer unpacks to: when its name, or a directory above it, comes twice in this
// tar, is no directory, or is whited out in it.
func (c *conversion) reorder(ctx context.Context, w *blobWriter, r io.Reader) error {
	f, err := os.CreateTemp(c.opts.TempDir, "lazuli-*")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	entries, err := spoolTar(ctx, f, r)
	if err != nil {
		return err
	}
	byName := map[string]int{} // index of the one entry with a name, or -1
	for i, e := range entries {
		if e.entry == nil {
			continue
		}
		names := []string{e.entry.Name}
		if dir, base := path.Split(e.entry.Name); base == ".wh..wh..opq" {
			names = append(names, strings.TrimSuffix(dir, "/"))
		} else if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
			names = append(names, dir+hidden)
		}
		for _, n := range names {
			if _, twice := byName[n]; twice {
				byName[n] = -1
			} else {
				byName[n] = i
			}
		}
	}
	// first returns the entries to write before the landmark, in order.
	var first []int
	for _, name := range c.opts.Profile {
		need, ok := needed(entries, byName, name, 0)
		if !ok {
			continue
		}
		c.mu.Lock()
		if c.profile == nil {
			c.profile = map[string]bool{}
		}
		c.profile[name] = true
		c.mu.Unlock()
		for _, i := range need {
			if !entries[i].done {
				entries[i].done = true
				first = append(first, i)
			}
		}
	}
	mark := toc.NoPrefetchLandmark
	if len(first) > 0 {
		mark = toc.PrefetchLandmark
	}
	for _, i := range first {
		if err := putSpooled(ctx, w, f, &entries[i]); err != nil {
			return err
		}
	}
	if err := landmark(ctx, w, mark); err != nil {
		return err
	}
	for i := range entries {
		if entries[i].done {
			continue
		}
		if err := putSpooled(ctx, w, f, &entries[i]); err != nil {
			return err
		}
	}
	return nil
}

// needed returns the entries that a file needs before it can be unpacked, itself the last: its directories and,
// if it is a hard link, the file. ok is false if there is no such file, or it must stay where it is.
func needed(entries []spooledEntry, byName map[string]int, name string, depth int) (need []int, ok bool) {
	i, ok := byName[name]
	if !ok || i < 0 || depth > 1 {
		return nil, false
	}
	e := entries[i].entry
	if e.Name != name {
		return nil, false // a whiteout
	}
	for at := 0; at < len(name); at++ {
		if name[at] != '/' && at > 0 {
			continue
		}
		dir := name[:at]
		d, there := byName[dir]
		if !there {
			continue
		}
		if d < 0 || entries[d].entry.Name != dir || entries[d].entry.Type != toc.Directory {
			return nil, false
		}
		need = append(need, d)
	}
	if e.Type == toc.Hardlink {
		target, ok := needed(entries, byName, e.Link, depth+1)
		if !ok {
			return nil, false
		}
		need = append(need, target...)
	}
	return append(need, i), true
}

// spoolTar writes the entries of a tar to f.
func spoolTar(ctx context.Context, f *os.File, r io.Reader) ([]spooledEntry, error) {
	var entries []spooledEntry
	t := newTarReader(r)
	out := bufio.NewWriterSize(f, 1<<20)
	var pos int64
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		x, err := t.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		e := spooledEntry{entry: x.entry, header: pos, headerSize: len(x.header)}
		if _, err := out.Write(x.header); err != nil {
			return nil, err
		}
		pos += int64(len(x.header))
		if x.entry != nil {
			if _, err := io.CopyN(out, x.data, x.entry.Size); err != nil {
				return nil, fmt.Errorf("entry %.300q: %w", x.entry.Name, err)
			}
			pos += x.entry.Size
		}
		entries = append(entries, e)
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, fmt.Errorf("after the last entry: %w", err)
	}
	return entries, out.Flush()
}

func putSpooled(ctx context.Context, w *blobWriter, f *os.File, e *spooledEntry) error {
	header := make([]byte, e.headerSize)
	if _, err := f.ReadAt(header, e.header); err != nil {
		return err
	}
	x := &tarEntry{header: header, entry: e.entry, data: bytes.NewReader(nil)}
	if e.entry != nil && e.entry.Size > 0 {
		x.data = io.NewSectionReader(f, e.header+int64(e.headerSize), e.entry.Size)
	}
	return put(ctx, w, x)
}
