package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A step is one change. Steps are planned from what is there before the first of them is done.
type step struct {
	said string                      // what was done, for the user
	show string                      // for a dry run: what is written, as lines with + and -
	do   func(context.Context) error // nil if nothing is to be done
	undo func(context.Context) error // nil if it cannot or need not be undone
}

// A plan is steps, and the paths of what they make and nothing but lazuli uses: what is to be removed some day.
type plan struct {
	steps []step
	made  []string
}

func (p *plan) add(s ...step) { p.steps = append(p.steps, s...) }

// carryOut does steps in order and prints each when it is done. If one fails, those before it are undone, the last one first,
// also if ctx has ended meanwhile.
func carryOut(ctx context.Context, w io.Writer, dryRun bool, steps []step) error {
	for i, s := range steps {
		if !dryRun && s.do != nil {
			err := ctx.Err()
			if err == nil {
				err = s.do(ctx)
			}
			if err != nil {
				return errors.Join(err, undo(context.WithoutCancel(ctx), w, steps[:i]))
			}
		}
		if s.said != "" {
			fmt.Fprintln(w, s.said)
		}
		if dryRun {
			fmt.Fprint(w, s.show)
		}
	}
	return nil
}

func undo(ctx context.Context, w io.Writer, done []step) error {
	var errs []error
	for i := len(done) - 1; i >= 0; i-- {
		s := done[i]
		if s.do == nil || s.undo == nil {
			continue
		}
		if err := s.undo(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undoing %q: %w", s.said, err))
		} else if s.said != "" {
			fmt.Fprintf(w, "undone: %s\n", s.said)
		}
	}
	return errors.Join(errs...)
}

// A file is what lies at a path, and whose it is. The zero file is none.
type file struct {
	exists   bool
	content  []byte
	mode     fs.FileMode // permissions
	uid, gid int
}

// read returns the regular file at path, or the zero file if nothing is there.
func read(path string) (file, error) {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case errors.Is(err, fs.ErrNotExist):
		return file{}, nil
	case err != nil:
		return file{}, fmt.Errorf("%s: %w", path, err)
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return file{}, fmt.Errorf("%s: is a symbolic link, so something else looks after it", path)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return file{}, fmt.Errorf("%s: is not a file", path)
	}
	b, err := os.ReadFile(path)
	return file{true, b, fs.FileMode(st.Mode & 0o777), int(st.Uid), int(st.Gid)}, err
}

// put makes f what lies at path, in one rename.
func (f file) put(path string) error {
	if !f.exists {
		return os.Remove(path)
	}
	t, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name())
	_, err = t.Write(f.content)
	if err == nil {
		err = t.Chmod(f.mode)
	}
	if err == nil && (f.uid != os.Geteuid() || f.gid != os.Getegid()) {
		err = t.Chown(f.uid, f.gid)
	}
	if err == nil {
		err = t.Sync()
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return err
	}
	return os.Rename(t.Name(), path)
}

// write is the step that gives the file at path new content. A new file gets mode, one that is there keeps mode and owner.
func write(path string, content []byte, mode fs.FileMode) (step, error) {
	was, err := read(path)
	if err != nil {
		return step{}, err
	}
	if was.exists && bytes.Equal(was.content, content) {
		return step{said: "unchanged " + path}, nil
	}
	now := file{true, content, mode, os.Geteuid(), os.Getegid()}
	if was.exists {
		now.mode, now.uid, now.gid = was.mode, was.uid, was.gid
	}
	return replace("wrote "+path, path, was, now), nil
}

// remove is the step that removes the file at path. The step does nothing, silently, if it is not there.
func remove(path string) (step, error) {
	was, err := read(path)
	if err != nil || !was.exists {
		return step{}, err
	}
	return replace("removed "+path, path, was, file{}), nil
}

func replace(said, path string, was, now file) step {
	return step{
		said: said, show: diff(was.content, now.content),
		do:   func(context.Context) error { return now.put(path) },
		undo: func(context.Context) error { return was.put(path) },
	}
}

// makeDirs adds to p the steps that make dir and the directories above it, as far as they are missing.
func (p *plan) makeDirs(dir string, mode fs.FileMode) error {
	if slices.Contains(p.made, dir) {
		return nil
	}
	switch st, err := os.Stat(dir); {
	case err == nil && !st.IsDir():
		return fmt.Errorf("%s: is not a directory", dir)
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := p.makeDirs(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	p.made = append(p.made, dir)
	p.add(step{
		said: "made " + dir,
		do: func(context.Context) error {
			if err := os.Mkdir(dir, mode); err != nil {
				return err
			}
			return os.Chmod(dir, mode) // whatever the umask
		},
		undo: func(context.Context) error { return os.Remove(dir) },
	})
	return nil
}

// removeEmpty is the step that removes a directory if nothing is in it by then.
func removeEmpty(dir string) step {
	st, err := os.Stat(dir)
	if err != nil {
		return step{}
	}
	gone := false
	return step{
		do: func(context.Context) error {
			err := os.Remove(dir)
			gone = err == nil
			if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		},
		undo: func(context.Context) error {
			if !gone {
				return nil
			}
			return errors.Join(os.Mkdir(dir, st.Mode().Perm()), os.Chmod(dir, st.Mode().Perm()))
		},
	}
}

// diff returns what changes from a to b, as lines that begin with - and +. Lines that are the same at the beginning and at
// the end are left out.
func diff(a, b []byte) string {
	if bytes.IndexByte(a, 0) >= 0 || bytes.IndexByte(b, 0) >= 0 {
		return ""
	}
	x, y := lines(a), lines(b)
	for len(x) > 0 && len(y) > 0 && x[0] == y[0] {
		x, y = x[1:], y[1:]
	}
	for len(x) > 0 && len(y) > 0 && x[len(x)-1] == y[len(y)-1] {
		x, y = x[:len(x)-1], y[:len(y)-1]
	}
	var out strings.Builder
	for _, l := range x {
		fmt.Fprintf(&out, "  - %s\n", l)
	}
	for _, l := range y {
		fmt.Fprintf(&out, "  + %s\n", l)
	}
	return out.String()
}

func lines(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}
