package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/store"
)

// A Record is what a node remembers of an image that was mounted.
type Record struct {
	Reference string        `json:"reference"`
	Digest    string        `json:"digest"` // of the manifest
	Chain     string        `json:"chain"`  // names the metadata image
	Layers    []RecordLayer `json:"layers"`
	Used      time.Time     `json:"used"`
}

// A RecordLayer is one layer of a Record.
type RecordLayer struct {
	ID     string `json:"id"` // names what the store keeps of it
	Digest string `json:"digest"`
	Size   int64  `json:"size"` // of the blob, in bytes
	Lazy   bool   `json:"lazy"`
}

// An Image is a Record and how much of the image is here.
type Image struct {
	Record
	Objects, ObjectsHere int   // files with different content
	Bytes, BytesHere     int64 // of files, each content once
	InUse                bool  // a process has it mounted
}

func (n *Node) recordPath(reference string) string {
	sum := sha256.Sum256([]byte(reference))
	return filepath.Join(n.root, "images", hex.EncodeToString(sum[:16])+".json")
}

// writeRecord notes that an image is used: among the images that are kept, and in the process's own folder.
func (n *Node) writeRecord(r *Record) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	path := n.recordPath(r.Reference)
	for _, path := range []string{path, filepath.Join(n.run, filepath.Base(path))} {
		temp := fmt.Sprintf("%s.%d", path, os.Getpid())
		if err := os.WriteFile(temp, b, 0o600); err != nil {
			return err
		}
		if err := os.Rename(temp, path); err != nil {
			return err
		}
	}
	return nil
}

// holdImages locks the set of images: shared by who adds to it, exclusively (unix.LOCK_EX) by who removes from it.
func (n *Node) holdImages(how int) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(n.root, "images", "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func readRecords(dir string) ([]Record, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	var records []Record
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var r Record
		if json.Unmarshal(b, &r) == nil { // a record that a power cut damaged is no record
			records = append(records, r)
		}
	}
	return records, nil
}

// inUse returns the records of images that living processes have mounted.
func (n *Node) inUse() ([]Record, error) {
	dirs, err := filepath.Glob(filepath.Join(n.root, "run", "*"))
	if err != nil {
		return nil, err
	}
	var all []Record
	for _, dir := range dirs {
		if dir == n.run {
			continue
		}
		records, err := readRecords(dir)
		if err != nil {
			return nil, err
		}
		all = append(all, records...)
	}
	return all, nil
}

// Images returns the images that are kept, last used first.
func (n *Node) Images() ([]Image, error) {
	records, err := readRecords(filepath.Join(n.root, "images"))
	if err != nil {
		return nil, err
	}
	used, err := n.inUse()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(records, func(a, b Record) int { return b.Used.Compare(a.Used) })
	images := make([]Image, len(records))
	for i, r := range records {
		images[i] = Image{Record: r, InUse: slices.ContainsFunc(used, func(u Record) bool { return u.Reference == r.Reference })}
		seen := map[store.Key]bool{}
		for _, l := range r.Layers {
			err := n.objectsOf(l.ID, func(key store.Key, size int64) bool {
				if seen[key] {
					return true
				}
				seen[key] = true
				here := n.store.Here(key, size)
				images[i].Objects++
				images[i].Bytes += size
				images[i].BytesHere += here
				if here == size {
					images[i].ObjectsHere++
				}
				return true
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%s: %w", r.Reference, err)
			}
		}
	}
	return images, nil
}

// ErrInUse says that an image cannot be removed because a process has it mounted.
var ErrInUse = errors.New("in use")

// Remove forgets an image and removes what only it needed. It returns the bytes of disk that became free.
func (n *Node) Remove(reference string) (freed int64, err error) {
	release, err := n.holdImages(unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer release()
	used, err := n.inUse()
	if err != nil {
		return 0, err
	}
	if slices.ContainsFunc(used, func(u Record) bool { return u.Reference == reference }) {
		return 0, fmt.Errorf("%s: %w: unmount it first", reference, ErrInUse)
	}
	err = os.Remove(n.recordPath(reference))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%s: no such image here: lazuli images lists them", reference)
	}
	if err != nil {
		return 0, err
	}
	return n.prune()
}

// Prune removes everything from the store that no image needs. It returns the bytes of disk that became free.
func (n *Node) Prune() (freed int64, err error) {
	release, err := n.holdImages(unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer release()
	return n.prune()
}

// prune is Prune for who holds the images exclusively.
func (n *Node) prune() (freed int64, err error) {
	kept, err := readRecords(filepath.Join(n.root, "images"))
	if err != nil {
		return 0, err
	}
	used, err := n.inUse()
	if err != nil {
		return 0, err
	}
	keep := map[string]bool{} // names in layers/ and meta/
	objects := map[store.Key]bool{}
	for _, r := range append(kept, used...) {
		keep[r.Chain+".erofs"] = true
		for _, l := range r.Layers {
			if keep[l.ID] {
				continue
			}
			keep[l.ID] = true
			err := n.objectsOf(l.ID, func(key store.Key, _ int64) bool { objects[key] = true; return true })
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return 0, err
			}
		}
	}
	for _, sub := range []string{"layers", "meta"} {
		entries, err := os.ReadDir(n.store.Path(sub))
		if err != nil {
			return freed, err
		}
		for _, e := range entries {
			if keep[e.Name()] {
				continue
			}
			path := n.store.Path(sub, e.Name())
			freed += diskUse(path)
			if err := os.RemoveAll(path); err != nil {
				return freed, err
			}
		}
	}
	n2, err := n.store.Prune(func(key store.Key) bool { return objects[key] })
	return freed + n2, err
}

// diskUse is how many bytes of disk a file or folder takes.
func diskUse(path string) int64 {
	var sum int64
	filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum
}

// Find returns the reference of the kept image that the user means: the reference itself, or a digest or the beginning of one.
func Find(images []Image, name string) (string, error) {
	var found []string
	for _, i := range images {
		if i.Reference == name {
			return name, nil
		}
		if len(name) >= 6 && strings.HasPrefix(strings.TrimPrefix(i.Digest, "sha256:"), strings.TrimPrefix(name, "sha256:")) {
			found = append(found, i.Reference)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%s: no such image here: lazuli images lists them", name)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%s means several images: %s", name, strings.Join(found, ", "))
}
