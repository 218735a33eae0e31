package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// A touchedFile is what a profile says of one file.
type touchedFile struct {
	Path   string  `json:"path"`
	Pieces []int   `json:"pieces"` // of profile.PieceSize bytes
	Share  float64 `json:"share"`  // the largest of a piece
	MS     float64 `json:"ms"`     // the first touch
}

// A shownProfile is a profile as show prints it.
type shownProfile struct {
	*rootfs.Learned               // nil for a file
	Files           []touchedFile `json:"files"`
}

// filesOf puts the pieces of each file together, in the order of the first touch.
func filesOf(p *profile.Profile) []touchedFile {
	list := []touchedFile{}
	at := map[string]int{}
	for _, x := range p.Pieces {
		i, ok := at[x.Path]
		if !ok {
			i = len(list)
			at[x.Path] = i
			list = append(list, touchedFile{Path: x.Path, MS: x.MS})
		}
		list[i].Pieces = append(list[i].Pieces, x.Index)
		list[i].Share = max(list[i].Share, x.Share)
	}
	for i := range list {
		slices.Sort(list[i].Pieces)
	}
	return list
}

// spans writes ascending numbers as "0-3,7".
func spans(list []int) string {
	var b strings.Builder
	for i := 0; i < len(list); {
		j := i
		for j+1 < len(list) && list[j+1] <= list[j]+1 {
			j++
		}
		if i > 0 {
			b.WriteByte(',')
		}
		if fmt.Fprint(&b, list[i]); list[j] > list[i] {
			fmt.Fprintf(&b, "-%d", list[j])
		}
		i = j + 1
	}
	return b.String()
}

func newShowCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show [flags] IMAGE|FILE",
		Short: "Show what was learned of an image's starts, or what a profile has",
		Long: `Show lists the files that a start reads, in the order in which it first touches them: which pieces of 64 KiB, the share of the
starts that read them (later ones count more), and after how many milliseconds. For an IMAGE it is what this node has learned of
its repository, the image last started first; what a start found here and had not to fetch it does not know.`,
		Example: `  lazuli profile show registry.example.com/app:2-lazy
  lazuli profile show --json app.profile`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []shownProfile
			if fi, err := os.Stat(args[0]); err == nil && fi.Mode().IsRegular() {
				p, err := readProfile(args[0])
				if err != nil {
					return err
				}
				list = []shownProfile{{Files: filesOf(p)}}
			} else {
				learned, err := a.learned(args[0])
				if err != nil {
					return err
				}
				for _, l := range learned {
					list = append(list, shownProfile{&l, filesOf(l.Profile)})
				}
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), list)
			}
			for i, s := range list {
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := s.print(printable(cmd.OutOrStdout())); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (s *shownProfile) print(w io.Writer) error {
	if s.Learned != nil {
		fmt.Fprintf(w, "%s, command %q: %d starts, the last one of %s at %s\n", s.Repository, s.Command, s.Starts, s.Image, s.Updated.Format("2006-01-02 15:04:05 MST"))
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "MS\tSHARE\tPIECES\tFILE")
	for _, f := range s.Files {
		fmt.Fprintf(table, "%.1f\t%.0f%%\t%s\t%s\n", f.MS, 100*f.Share, spans(f.Pieces), f.Path)
	}
	return table.Flush()
}

// learned returns what this node has learned of the repository of an image, at least one.
func (a *app) learned(image string) ([]rootfs.Learned, error) {
	ref, err := parseReference(image)
	if err != nil {
		return nil, err
	}
	return a.learnedOf(ref)
}

func (a *app) learnedOf(ref remote.Reference) ([]rootfs.Learned, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("what was learned is for root only: run it with sudo")
	}
	list, err := rootfs.Profiles(a.Root, ref)
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("%v: nothing was learned of its repository below %s: start an image of it, or record one (lazuli profile -o FILE IMAGE)", ref, a.Root)
	}
	return list, err
}

func newMergeCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "merge -o OUT FILE…",
		Short: "Make one profile of several",
		Long: `Merge writes the profile of the runs of all FILEs, the oldest first: what the later ones do not have counts less with each, and is left
out in the end. OUT may be one of them.`,
		Example: `  lazuli profile merge -o app.profile monday.profile tuesday.profile`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return &usageError{errors.New("profile merge: want -o OUT")}
			}
			var all *profile.Profile
			for _, name := range args {
				p, err := readProfile(name)
				if err != nil {
					return err
				}
				all = profile.Merge(all, p)
			}
			return writeProfile(out, all)
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "write the profile to `OUT`")
	return cmd
}

func newPushCommand(a *app) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "push [flags] IMAGE",
		Short: "Put a startup pack of what was learned beside an image",
		Long: `Push makes the startup pack of IMAGE from what this node has learned of its repository and command, or from the profile in FILE, and
puts it beside the image into its registry. With share = true in its configuration a daemon does so by itself.`,
		Example: `  lazuli profile push registry.example.com/app:2-lazy
  lazuli profile push --profile app.profile registry.example.com/app:2-lazy`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := parseReference(args[0])
			if err != nil {
				return err
			}
			var p *profile.Profile
			var learned []rootfs.Learned
			if file != "" {
				p, err = readProfile(file)
			} else {
				learned, err = a.learnedOf(ref)
			}
			if err != nil {
				return err
			}
			return a.withRecorder(cmd, func(node *rootfs.Node) (err error) {
				r, err := node.Mount(cmd.Context(), ref, "", rootfs.MountOptions{})
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, r.Close()) }()
				if p == nil {
					command := append(slices.Clone(r.Config.Config.Entrypoint), r.Config.Config.Cmd...)
					i := slices.IndexFunc(learned, func(l rootfs.Learned) bool { return slices.Equal(l.Command, command) })
					if i < 0 {
						return fmt.Errorf("%v: what was learned of its repository is of other commands than %q: name a profile (--profile FILE)", ref, command)
					}
					p = learned[i].Profile
				}
				return a.makePack(cmd, ref, r.Chain(), r.Image, p, "", true)
			})
		},
	}
	cmd.Flags().StringVar(&file, "profile", "", "the profile's `FILE`")
	return cmd
}
