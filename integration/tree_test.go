package integration

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCompare breaks one thing at a time in a copy of a tree: Compare must say
// that thing, and nothing else.
func TestCompare(t *testing.T) {
	needRoot(t)
	build := func(dir string) {
		old := []unix.Timespec{{Sec: 1, Nsec: 2}, {Sec: -3, Nsec: 4}}
		for _, f := range []string{"file", "one", "other\xff"} {
			must(t, os.WriteFile(filepath.Join(dir, f), []byte("content of "+f), 0o644))
		}
		must(t, os.Link(filepath.Join(dir, "one"), filepath.Join(dir, "two")))
		must(t, os.Link(filepath.Join(dir, "one"), filepath.Join(dir, "three")))
		must(t, os.Link(filepath.Join(dir, "other\xff"), filepath.Join(dir, "other two")))
		must(t, os.Symlink("nowhere", filepath.Join(dir, "symlink")))
		must(t, unix.Mknod(filepath.Join(dir, "device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		must(t, os.MkdirAll(filepath.Join(dir, "sub/dir"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "sub/dir/file"), nil, 0o644))
		must(t, unix.Lsetxattr(filepath.Join(dir, "file"), "user.a", []byte("x\x00y"), 0))
		for _, p := range []string{"file", "one", "other\xff", "symlink", "device", "sub/dir/file", "sub/dir", "sub", ""} {
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, p), old, unix.AT_SYMLINK_NOFOLLOW))
		}
	}
	keep := func(dir, path string, change func()) { // change, and put the times back
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dir, path), &st))
		change()
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, path), []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
	}
	a := t.TempDir()
	build(a)
	want, err := Snapshot(a)
	must(t, err)
	if len(want) != 12 {
		t.Errorf("%d names, want 12", len(want))
	}
	for _, test := range []struct {
		name  string
		spoil func(dir string)
		want  []string // path and field
	}{
		{"nothing", func(string) {}, nil},
		{"content", func(dir string) {
			keep(dir, "file", func() { must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("CONTENT of file"), 0)) })
		}, []string{"file sha256"}},
		{"size", func(dir string) { keep(dir, "file", func() { must(t, os.Truncate(filepath.Join(dir, "file"), 100)) }) },
			[]string{"file sha256", "file size"}},
		{"mode", func(dir string) { must(t, os.Chmod(filepath.Join(dir, "file"), 0o645)) }, []string{"file mode"}},
		{"setuid", func(dir string) { must(t, os.Chmod(filepath.Join(dir, "file"), 0o644|os.ModeSetuid)) }, []string{"file mode"}},
		{"uid", func(dir string) { must(t, os.Lchown(filepath.Join(dir, "symlink"), 70000, -1)) }, []string{"symlink uid"}},
		{"gid", func(dir string) { must(t, os.Lchown(filepath.Join(dir, "sub"), -1, 1)) }, []string{"sub gid"}},
		{"a nanosecond", func(dir string) {
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, "device"), []unix.Timespec{{}, {Sec: -3, Nsec: 5}}, unix.AT_SYMLINK_NOFOLLOW))
		}, []string{"device mtime"}},
		{"the root", func(dir string) { must(t, os.Chmod(dir, 0o700)) }, []string{" mode"}},
		{"xattr gone", func(dir string) { must(t, unix.Lremovexattr(filepath.Join(dir, "file"), "user.a")) }, []string{"file xattrs"}},
		{"xattr more", func(dir string) { must(t, unix.Lsetxattr(filepath.Join(dir, "file"), "user.b", nil, 0)) }, []string{"file xattrs"}},
		{"xattr value", func(dir string) { must(t, unix.Lsetxattr(filepath.Join(dir, "file"), "user.a", []byte("x"), 0)) }, []string{"file xattrs"}},
		{"link count", func(dir string) {
			must(t, os.Link(filepath.Join(dir, "file"), filepath.Join(t.TempDir(), "outside")))
		}, []string{"file nlink"}},
		{"another inode", func(dir string) { // "three" moves from one group to another that stays as large
			keep(dir, "", func() {
				must(t, os.Remove(filepath.Join(dir, "two")))
				must(t, os.Link(filepath.Join(dir, "other\xff"), filepath.Join(dir, "two")))
			})
		}, []string{"one nlink", "other two nlink", "other\xff nlink", "three nlink", "two first", "two sha256", "two size"}},
		{"target", func(dir string) {
			keep(dir, "", func() {
				must(t, os.Remove(filepath.Join(dir, "symlink")))
				must(t, os.Symlink("NOWHERE", filepath.Join(dir, "symlink")))
			})
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, "symlink"), []unix.Timespec{{}, {Sec: -3, Nsec: 4}}, unix.AT_SYMLINK_NOFOLLOW))
		}, []string{"symlink target"}},
		{"rdev", func(dir string) {
			keep(dir, "device", func() {
				keep(dir, "", func() {
					must(t, os.Remove(filepath.Join(dir, "device")))
					must(t, unix.Mknod(filepath.Join(dir, "device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 259))))
				})
			})
		}, []string{"device rdev"}},
		{"missing", func(dir string) {
			keep(dir, "sub/dir", func() { must(t, os.Remove(filepath.Join(dir, "sub/dir/file"))) })
		}, []string{"sub/dir/file name"}},
		{"more", func(dir string) { keep(dir, "sub", func() { must(t, os.Mkdir(filepath.Join(dir, "sub/new"), 0o755)) }) }, []string{"sub/new name"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			build(dir)
			test.spoil(dir)
			got, err := Snapshot(dir)
			must(t, err)
			var fields []string
			for _, d := range Compare(want, got) {
				fields = append(fields, d.Path+" "+d.Field)
				t.Log(d)
			}
			if !slices.Equal(fields, test.want) {
				t.Errorf("differences %q, want %q", fields, test.want)
			}
		})
	}
}
